"""layerdistill"""
