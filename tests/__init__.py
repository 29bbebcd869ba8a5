"""The tests, a package so that helpers of fuzz and torture are found before other packages of this name."""
