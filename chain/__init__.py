"""What the chains say and how we speak to them; knows nothing of buyers, prices or accounts."""
