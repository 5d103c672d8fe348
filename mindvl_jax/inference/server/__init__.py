"""An HTTP server over one engine, with the OpenAI interface. See docs/serve.md."""
