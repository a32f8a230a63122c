"""The public API: a session opens engines once, checks requests and generates videos."""
