"""The prompt templates of the published code."""

PROMPT_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def prompts(noun: str) -> list[str]:
    """The noun in every template."""
    return [template.format(noun) for template in PROMPT_TEMPLATES]
