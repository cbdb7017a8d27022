"""What one does with a trained selector: ask about any picture, chat, run lmms-eval's tasks."""
