"""Models on disk: this project's folders, and the formats of others."""
