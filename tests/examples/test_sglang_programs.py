"""Programs for SGLang's offline engine, with `jaxgen` in place of `sglang`, run as written."""

import textwrap

from example_harness import run_program

# Each program is written the way SGLang's users write them: no main guard, default options, positional
# arguments. Only the model's path is filled in.
PROGRAMS = {
    "batch": """
        import jaxgen as sgl

        llm = sgl.Engine(model_path="{model}")
        prompts = [
            "Hello, my name is",
            "The president of the United States is",
            "The capital of France is",
            "The future of AI is",
        ]
        sampling_params = {{"temperature": 0.8, "top_p": 0.95}}
        outputs = llm.generate(prompts, sampling_params)
        for prompt, output in zip(prompts, outputs):
            print("===============================")
            print(f"Prompt: {{prompt}}\\nGenerated text: {{output['text']}}")
        llm.shutdown()
    """,
    "modes": """
        import asyncio

        import jaxgen as sgl
        from jaxgen.utils import async_stream_and_merge, print_highlight, stream_and_merge

        llm = sgl.Engine(model_path="{model}")
        prompts = [
            "Write a short, neutral self-introduction. Hello, my name is",
            "Provide a concise factual statement about France. The capital of France is",
        ]
        sampling_params = {{"temperature": 0, "top_p": 0.9, "max_new_tokens": 24}}

        texts = [output["text"] for output in llm.generate(prompts, sampling_params)]
        merged = [stream_and_merge(llm, prompt, sampling_params) for prompt in prompts]


        async def main():
            outputs = await llm.async_generate(prompts, sampling_params)
            awaited = [output["text"] for output in outputs]
            pieces = []
            for prompt in prompts:
                pieces.append("")
                async for chunk in async_stream_and_merge(llm, prompt, sampling_params):
                    pieces[-1] += chunk
            generator = await llm.async_generate(prompts[0], sampling_params, stream=True)
            async for chunk in generator:
                final = chunk["text"]
            return awaited, pieces, final


        awaited, pieces, final = asyncio.run(main())
        assert texts == merged == awaited == pieces, (texts, merged, awaited, pieces)
        assert final == texts[0]
        print_highlight("all modes agree")
        llm.shutdown()
    """,
    "arguments": """
        import argparse
        import dataclasses

        import jaxgen as sgl
        from jaxgen import ServerArgs


        def main(server_args):
            llm = sgl.Engine(**dataclasses.asdict(server_args))
            output = llm.generate("The capital of France is", {{"max_new_tokens": 4, "ignore_eos": True}})
            print(output["meta_info"]["completion_tokens"])
            llm.shutdown()


        if __name__ == "__main__":
            parser = argparse.ArgumentParser()
            ServerArgs.add_cli_args(parser)
            args = parser.parse_args(["--model-path", "{model}"])
            main(ServerArgs.from_cli_args(args))
    """,
}


def run(name, model, cache, tmp_path):
    program = tmp_path / f"{name}.py"
    program.write_text(textwrap.dedent(PROGRAMS[name]).format(model=model))
    return run_program(program, cache)


def test_batch_of_four_prompts(model, cache, tmp_path):
    text = run("batch", model, cache, tmp_path)
    assert text.count("Generated text: ") == 4


def test_the_four_modes_agree(model, cache, tmp_path):
    assert "all modes agree" in run("modes", model, cache, tmp_path)


def test_engine_from_server_args(model, cache, tmp_path):
    assert run("arguments", model, cache, tmp_path).strip().endswith("4")
