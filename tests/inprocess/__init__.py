"""Apps that run inside the test: Starlette's TestClient, httpx-ws, pytest-asyncio and anyio's plugin."""
