"""The one package that speaks to Stripe: identity checks."""
