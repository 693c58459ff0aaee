"""OpenAI's API as functions from a request body to a reply, independent of how either travels (HTTP, batch files)."""
