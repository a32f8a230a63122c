"""The public API. A session opens engines once, checks requests and generates videos."""
