"""What `deepfloyd doctor` says of a machine and of what a run file needs: findings, each a line and what mends it.

Entry: `doctor.examine.examine`. What Prefect is asked lies in `flows/serving/checkup.py`.
"""
