"""Run all stages from data to a served model with the kit's own commands."""
