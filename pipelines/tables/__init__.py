"""The paper's tables and figure: what is run for a cell, and how it is shown. The program is pipelines/table.py."""
