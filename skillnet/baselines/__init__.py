"""What SkillNet is compared with: dense, mixture of experts, and a specialist per task."""
