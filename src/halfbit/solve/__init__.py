"""Which grid point each weight takes. `naive.py` is the definition, `gptq.py` and `rtn.py` are what is run."""
