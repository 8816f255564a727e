"""Settings of a run: one dataclass for each group, how they are read and checked, and what may change on resume.

May import `settings`, `model.config`, `model.parameters`, `data.config`, `data.errors` and `data.files.remote`.

- written config: the fields as a user sets them, with None where a value is derived (`Config`).
- resolved config: the same fields with every derived value filled in (`ResolvedConfig`).
- resume rule: what a change of a field does when a run resumes: frozen (refused), warn (accepted with a warning) or
  free (accepted silently).
- problem: one line that names a field, what is wrong with it, and a remedy.
"""
