"""Further scores of images and texts, each a pass of its own: `capfilt score RUN --also NAME`."""
