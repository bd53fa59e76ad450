"""The whole way from data to a served model, by the kit's own commands."""
