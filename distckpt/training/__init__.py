"""A whole training job that resumes: what belongs to its state, when it is saved, whether a resume really is one."""
