"""Makes a student from its teacher: a part of it, given or searched for, or a mixture of MoE experts."""
