"""New scenes shared by several processes: the plan, claims, engines. Imports training and below."""
