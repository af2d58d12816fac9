"""A placement of a run as a model folder that other engines load.

`hf` writes a format that transformers has, where one can express the placement: the family's own, or Mistral's or
Qwen2's for windows. Other hybrids get model_type `nasbench`, which AutoModelForCausalLM loads after `import nasbench`.
`jet-nemotron` writes `JetNemotronForCausalLM`, the format of the published Jet-Nemotron checkpoints, for placements of
A, W and J.
"""

from nasbench.export.folder import check_export, export, write_model

__all__ = ["check_export", "export", "write_model"]
