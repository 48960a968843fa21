"""The six VAEs that the paper measures OD-VAE against (Table 1, Table 2), behind one interface."""
