"""Who is answered: by token, by name, by origin, by size."""

import pytest

from dsdiff.server.options import Limits, ServerOptions

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

TOKEN = "a secret of many letters"


@pytest.fixture
def ask():
    """(options, headers, ...) -> the reply of an application behind the guard that sends back how much it was sent."""
    import asyncio

    from fastapi import FastAPI, Request

    from dsdiff.server.guard import Guard

    app = FastAPI()

    @app.post("/")
    async def size(request: Request):
        return {"size": len(await request.body())}

    def call(options, headers=(), content=b"", base="http://127.0.0.1:7860", **more):
        async def send():
            transport = httpx.ASGITransport(app=Guard(app, options))
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                return await client.post("/", headers=dict(headers), content=content, **more)

        return asyncio.run(send())

    return call


def test_a_token_is_asked_for(ask):
    options = ServerOptions(host="0.0.0.0", token=TOKEN)
    assert ask(options, base="http://example.org").status_code == 401
    for headers, status in (
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": f"bearer  {TOKEN}"}, 200),
        ({"authorization": f"Bearer {TOKEN}x"}, 401),
        ({"authorization": "Basic ?"}, 401),
        ({"authorization": f"Digest {TOKEN}"}, 401),
    ):
        assert ask(options, headers).status_code == status, headers
    for password, status in ((TOKEN, 200), ("", 401), ("ü", 401)):
        assert ask(options, auth=("anybody", password)).status_code == status
    refusal = ask(options)
    assert refusal.headers["www-authenticate"].startswith("Basic") and "token" in refusal.json()["detail"]


def test_others_sites_and_names_are_refused(ask):
    local = ServerOptions()
    for headers, status in (
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "rebound.example.org"}, 400),
        ({"host": "[x"}, 400),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://127.0.0.1:1234"}, 403),
        ({"origin": "https://example.org"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[x"}, 403),
    ):
        assert ask(local, headers).status_code == status, headers
    policy = ask(local).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "http" not in policy and "*" not in policy


def test_large_bodies_are_refused(ask):
    options = ServerOptions(limits=Limits(body=10))
    assert ask(options, content=b"x" * 10).json() == {"size": 10}
    assert ask(options, content=b"x" * 11).status_code == 413

    async def chunks():  # of a body that does not say how long it is
        for _ in range(11):
            yield b"x"

    reply = ask(options, content=chunks())
    assert reply.status_code == 413 and reply.json() == {"detail": "a request may have 10 bytes at most"}


def test_addresses_that_need_a_token():
    for host in ("127.0.0.1", "127.0.0.9", "localhost", "::1"):
        assert ServerOptions(host=host).is_local
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.org"):
        with pytest.raises(ValueError, match="give a --token"):
            ServerOptions(host=host)
        assert not ServerOptions(host=host, token=TOKEN).is_local
    with pytest.raises(ValueError, match="8 ASCII characters"):
        ServerOptions(token="short")
