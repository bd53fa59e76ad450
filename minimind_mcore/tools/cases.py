"""Cases of the tool-calling evaluation: MiniMind's eight, minimind-ascend's six, and generated ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minimind_mcore.tools.builtin import FACTORS, RATES, WEATHER
from minimind_mcore.tools.registry import TOOLS

GENERATED = 300
Arguments = Mapping[str, object]


@dataclass(frozen=True)
class Expected:
    """A call that a case expects.

    Attributes:
        name: of the tool.
        arguments: None if any are right, such as those that depend on the result of an earlier call.
    """

    name: str
    arguments: Arguments | None = None


@dataclass(frozen=True)
class Case:
    """A question, the tools that are offered, and the calls that are expected.

    Attributes:
        task: groups cases in the scores.
        messages: of the conversation.
        tools: definitions in OpenAI's form.
        calls: in the order in which they are expected; none: the model should answer without a tool.
    """

    task: str
    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]]
    calls: Sequence[Expected]

    @property
    def question(self) -> str:
        """The last message."""
        return str(self.messages[-1]["content"])


def _case(task: str, question: str, tools: str, *calls: Expected) -> Case:
    definitions = [TOOLS[name].definition for name in tools.split()]
    return Case(task, [{"role": "user", "content": question}], definitions, calls)


def _weather(location: str) -> Expected:
    return Expected("get_current_weather", {"location": location})


def _convert(value: int, from_unit: str, to_unit: str) -> Expected:
    return Expected("unit_converter", {"value": value, "from_unit": from_unit, "to_unit": to_unit})


def minimind() -> list[Case]:
    """Return the cases of MiniMind's eval_toolcall.py."""
    rate = Expected("get_exchange_rate", {"from_currency": "USD", "to_currency": "CNY"})
    translation = Expected("translate_text", {"text": "你好世界", "target_language": "english"})
    rows: list[tuple[str, str, list[Expected]]] = [
        ("帮我算一下 256 乘以 37 等于多少", "calculate_math get_current_time",
         [Expected("calculate_math", {"expression": "256*37"})]),
        ("现在几点了？", "get_current_time random_number", [Expected("get_current_time", {})]),
        ("帮我把100公里换算成英里", "unit_converter calculate_math", [_convert(100, "km", "miles")]),
        ("帮我生成一个1到1000的随机数，然后计算它的平方", "random_number calculate_math text_length",
         [Expected("random_number", {"min": 1, "max": 1000}), Expected("calculate_math")]),
        ("北京今天天气怎么样？", "get_current_weather get_current_time", [_weather("北京")]),
        ("查一下美元兑人民币汇率", "get_exchange_rate get_current_time", [rate]),
        ("把'你好世界'翻译成英文", "translate_text text_length", [translation]),
        ("What is the weather in Tokyo? Also convert 30 celsius to fahrenheit.",
         "get_current_weather unit_converter get_current_time",
         [_weather("Tokyo"), _convert(30, "celsius", "fahrenheit")]),
    ]  # fmt: skip
    return [_case("minimind", question, tools, *calls) for question, tools, calls in rows]


def minimind_ascend() -> list[Case]:
    """Return the cases of minimind-ascend's eval_tool_call.py, with the registry's names of its tools."""
    rows: list[tuple[str, list[Expected]]] = [
        ("北京今天天气怎么样？", [_weather("北京")]),
        ("帮我计算 123 * 456", [Expected("calculate_math", {"expression": "123*456"})]),
        ("现在几点了？", [Expected("get_current_time", {})]),
        ("搜索一下最新的Python版本", [Expected("search")]),
        ("请介绍一下你自己", []),
        ("上海的天气如何？", [_weather("上海")]),
    ]
    offered = "get_current_weather calculate_math search get_current_time"
    return [_case("minimind-ascend", question, offered, *calls) for question, calls in rows]


def _ask_weather(r: random.Random) -> tuple[str, Expected]:
    city = r.choice(list(WEATHER))
    return r.choice(("{}今天天气怎么样？", "What is the weather in {}?")).format(city), _weather(city)


def _ask_product(r: random.Random) -> tuple[str, Expected]:
    a, b = r.randint(12, 9999), r.randint(12, 9999)
    question = r.choice(("帮我算一下 {} 乘以 {} 等于多少", "What is {} times {}?")).format(a, b)
    return question, Expected("calculate_math", {"expression": f"{a}*{b}"})


def _ask_number(r: random.Random) -> tuple[str, Expected]:
    low, high = sorted(r.sample(range(1, 10_000), 2))
    question = r.choice(("帮我生成一个{}到{}的随机数", "Draw a random number from {} to {}.")).format(low, high)
    return question, Expected("random_number", {"min": low, "max": high})


def _ask_conversion(r: random.Random) -> tuple[str, Expected]:
    (source, target), value = r.choice(list(FACTORS)), r.randint(2, 5000)
    question = r.choice(("帮我把 {} {} 换算成 {}", "Convert {} {} to {}.")).format(value, source, target)
    return question, _convert(value, source, target)


def _ask_rate(r: random.Random) -> tuple[str, Expected]:
    source, target = r.choice(list(RATES))
    question = r.choice(("查一下 {} 兑 {} 的汇率", "What is the exchange rate from {} to {}?")).format(source, target)
    return question, Expected("get_exchange_rate", {"from_currency": source, "to_currency": target})


def _ask_time(r: random.Random) -> tuple[str, Expected]:
    zone = r.choice(("Asia/Shanghai", "America/New_York", "Europe/London", "Asia/Tokyo"))
    return r.choice(("{} 现在几点？", "What time is it in {}?")).format(zone), Expected(
        "get_current_time", {"timezone": zone}
    )


TALK = ("请介绍一下你自己", "你好", "谢谢你的帮助", "Hello, who are you?", "Tell me a short joke.", "写一句祝福语")
ASKS: Sequence[Callable[[random.Random], tuple[str, Expected]]] = (
    _ask_weather, _ask_product, _ask_number, _ask_conversion, _ask_rate, _ask_time,
)  # fmt: skip


def generated(seed: int, count: int = GENERATED) -> list[Case]:
    """Return generated cases, one in ten without a call; each offers two to four tools."""
    r = random.Random(seed)
    cases = []
    for number in range(count):
        calls = []
        question = r.choice(TALK)
        if number % 10:
            question, call = r.choice(ASKS)(r)
            calls = [call]
        names = [call.name for call in calls]
        others = [name for name in TOOLS if name not in names]
        names += r.sample(others, r.randint(2, 4) - len(names))
        r.shuffle(names)
        cases.append(_case("generated", question, " ".join(names), *calls))
    return cases


SETS: Mapping[str, Callable[[int], list[Case]]] = {
    "minimind": lambda seed: minimind(),
    "minimind-ascend": lambda seed: minimind_ascend(),
    "generated": generated,
}
