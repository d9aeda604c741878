"Begins what takes long before the first test, on a core that most tests leave idle."


def pytest_collection_finish(session):
    modules = {item.module for item in session.items if "outcomes" in getattr(item, "fixturenames", ())}
    if not session.config.option.collectonly:
        for module in modules: module.begun()
