CAMPAIGNS = []


def make_world(folder):
    pass
