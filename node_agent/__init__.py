"""The operator's side: an agent that runs beside an inference engine and dials out."""
