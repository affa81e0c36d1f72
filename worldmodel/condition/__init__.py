"""Actions and prompts become conditions of the flow."""
