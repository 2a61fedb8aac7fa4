"""An endpoint that OpenAI clients speak to: the corrected model and the pristine one, by name."""
