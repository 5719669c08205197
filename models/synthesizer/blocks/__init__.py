"""Building blocks of synthesizers, named as in the papers; every voice family uses them."""
