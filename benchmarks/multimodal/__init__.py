"""Language models that read patches in their prompts: what a shorter tower and prompt save, stage by stage."""
