"""Text to tokens (`text`) and pictures to tokens (`image`)."""
