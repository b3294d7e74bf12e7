"""The synthetic world: images, captions, questions and dialogues whose truth is known."""
