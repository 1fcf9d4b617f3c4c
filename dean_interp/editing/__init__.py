"""Sets become changes of the model."""
