"""Many runs compared: spaces, trials, studies, statistics."""
