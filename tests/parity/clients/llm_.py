"""Simon Willison's llm, by its settings for other servers of OpenAI's protocol. It cannot require a call."""

import json
import os
import sys
import tempfile
from pathlib import Path

url, asked = sys.argv[1], json.loads(sys.argv[2])
with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    Path(folder, "extra-openai-models.yaml").write_text(
        "".join(
            f"- model_id: {name}\n  model_name: {name}\n  api_base: {url}/v1\n"
            "  supports_tools: true\n  supports_schema: true\n"
            for name in (asked["model"], "nobody")
        )
    )
    import llm

    model = llm.get_model(asked["model"])
    options = {"temperature": 0, "max_tokens": asked["max_tokens"], "key": "none"}
    told = {}
    told["plain"] = model.prompt(asked["text"], stream=False, **options).text()
    told["stream"] = "".join(model.prompt(asked["text"], stream=True, **options))
    told["schema"] = json.loads(
        model.prompt(asked["text"], schema=asked["schema"], stream=False, **options).text()
    )
    function = asked["function"]
    tool = llm.Tool(
        function["name"], function["description"], function["parameters"], lambda **given: "sunny"
    )
    told["with_tool"] = model.prompt(asked["text"], tools=[tool], stream=False, **options).text()
    try:
        llm.get_model("nobody").prompt(asked["text"], stream=False, **options).text()
    except Exception as error:
        told["error"] = "model_not_found" if "nobody" in str(error) else str(error)
print(json.dumps(told))
