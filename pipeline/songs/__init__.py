"""Songs before they are decoded: the corpus, the plan, the source files and the balance."""
