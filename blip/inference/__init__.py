"""A trained model at work: generating, matching, answering, explaining."""
