"""A tokenizer's chat template is a stranger's program: it reads what it is given, and comes to an end."""

import time
from types import SimpleNamespace

import pytest

from sfumato.errors import Failed, Refused
from sfumato.models.pretrained.chat_templates import bounded_templates, check_templates, fault_of

from .tokenizers import CHAT, qwen_tokenizer

OF_MAKERS = {
    "ours": CHAT,
    "Qwen 3, in part": "{%- set ns = namespace(multi=true, last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi and m.role == 'user' and not (m.content.startswith('<a>') and "
    "m.content.endswith('</a>')) %}{%- set ns.multi = false %}"
    "{%- set ns.last = index %}{%- endif %}{%- endfor %}{{ messages[0].content|trim }}"
    "{{ messages[0].content.split('</think>')[-1].lstrip('\\n') }}{{ tools|tojson if tools }}",
    "Gemma, in part": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles alternate') }}{% endif %}{{ m['content'] | trim + '<end>\n' }}{% endfor %}",
    "one that marks the answer": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.first %}{% continue %}{% endif %}{% endfor %}",
}
GROWING = {
    "by a number": "{{ 'a' * 10000000000 }}",
    "by a power": "{{ 10 ** 1000000000 }}",
    "by a filter": "{{ 'a'|center(10000000000) }}",
    "by a method": "{{ 'a'.ljust(10000000000) }}",
    "by a method's name": "{{ 'a'['zfill'](10000000000) }}",
    "by a format": "{{ '%9999999999d' % 1 }}",
    "by a format in parts": "{% set f = '%' ~ '9999999999d' %}{{ f % 1 }}",
    "by another format": "{{ '{:>9999999999}'.format(1) }}",
    "by its own length": "a" * 200_000,
    "not at all: it is none": "{% for %}",
    "by nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a text that doubles": "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}",
    "a macro that calls itself": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}
ESCAPING = {
    "the classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals": "{{ raise_exception.__globals__ }}",
    "the machine": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "the messages": "{{ messages.append(1) }}",
}


def pipe_of(template: str) -> SimpleNamespace:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = template
    return SimpleNamespace(components={"tokenizer": tokenizer, "scheduler": None})


def rendered(template: str) -> str:
    """What a template makes of a prompt, read as a pipeline is."""
    pipe = pipe_of(template)
    check_templates(pipe)
    with bounded_templates(pipe):
        return pipe.components["tokenizer"].apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False
        )


@pytest.mark.parametrize("name", OF_MAKERS)
def test_the_templates_of_models_are_rendered(name):
    assert not fault_of(OF_MAKERS[name]) and "a" in rendered(OF_MAKERS[name])


@pytest.mark.parametrize("name", GROWING)
def test_a_template_that_could_make_any_length_is_refused_when_it_is_loaded(name):
    with pytest.raises(Refused, match="The chat template of tokenizer"):
        check_templates(pipe_of(GROWING[name]))


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_stopped(name):
    began = time.process_time()
    with pytest.raises(Failed, match="The chat template of a tokenizer"):
        rendered(ENDLESS[name])
    assert time.process_time() - began < 30


@pytest.mark.parametrize("name", ESCAPING)
def test_a_template_reaches_nothing_of_python(name):
    """Law: transformers renders in jinja2's immutable sandbox, in the version that is installed too."""
    try:
        assert rendered(ESCAPING[name]) == ""
    except Failed as problem:
        assert "chat template" in str(problem)
