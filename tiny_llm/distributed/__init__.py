"""One model on several processes: who they are, and how arrays and plans travel. No model is known here."""
