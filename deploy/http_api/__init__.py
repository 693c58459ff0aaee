"""The OpenAI service over HTTP: one ASGI application, run by Ray Serve or by any other ASGI server."""
