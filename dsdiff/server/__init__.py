"""A server: one model that is kept, the web UI's API for programs, and a page for people."""
