# ruff: noqa: E501
"""Chat templates as folders hold them: the known families in the spellings of many repositories, and others."""

IMAGES = "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
    "alternate user/assistant/user/assistant/...') }}{% endif %}"
)
VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the {0}\\'s questions."
)

PARTS = {  # a message's content is a list of parts, the picture among them
    "llava-hf": "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{# Render all images first #}" + IMAGES + "{# Render all text next #}{% if message['role'] != "
    "'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + "
    "' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "llava-hf, plain": "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}"
    "<image>\n{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:"
    "{% endif %}",
    "llava-hf, in lines": """{%- for message in messages -%}
    {#- the role, then its parts -#}
    {{- message["role"].upper() + ": " -}}
    {%- for item in message["content"] -%}
        {%- if item["type"] == "image" -%}
            {{- "<image>\\n" -}}
        {%- elif item["type"] == "text" -%}
            {{- item["text"] + " " -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "ASSISTANT:" -}}
{%- endif -%}
""",
    "llama-3 of case 08": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3-llava-next": "{% for message in messages %}{{'<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    "\\n\\n'}}" + IMAGES + "{% if message['role'] != 'assistant' %}" + TEXTS + "{% else %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] }}"
    "{% endgeneration %}{% endfor %}{% endif %}{{'<|eot_id|>'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "llava-v1.6-mistral": "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\\n' + "
    "message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{# Render all images first #}" + IMAGES + "{# Render all text next #}" + TEXTS + "{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "llava-med": "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\\n' + "
    "message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES
    + TEXTS + "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}{{message['content'][0]['text'] + '</s>'}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "vicuna by parts": "{{ '" + VICUNA.format("human") + "' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' }}" + IMAGES + TEXTS + "{% elif message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT: ' }}" + TEXTS + "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ ' ASSISTANT:' }}{% endif %}",
}  # fmt: skip
STRINGS = {  # a message's content is text, with the picture as "<image>\n" in it
    "llava-hf, simplified": "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | "
    "upper + ': ' }}{% endif %}{{ message['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}",
    "llama-3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama-3, first version": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "llama-3, literal": "{% for message in messages %}{{'<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    "\n\n' + message['content'] | trim + '<|eot_id|>'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral v0.1": "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant roles are "
    "supported!') }}{% endif %}{% endfor %}",
    "mistral v0.2": "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}",
    "mistral, spaced": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token"
    " }}{% endif %}{% endfor %}",
    "mistral v0.2, later": "{%- if messages[0][\"role\"] == \"system\" %}\n    {%- set system_message = messages[0]"
    "[\"content\"] %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}"
    "\n{%- endif %}\n\n{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}\n        {{- raise_exception('After the optional system message, conversation roles must "
    "alternate user/assistant/user/assistant/...') }}\n    {%- endif %}\n    {%- if message[\"role\"] == \"user\" %}\n"
    "        {%- if loop.first and system_message is defined %}\n            {{- \" [INST] \" + system_message + "
    "\"\\n\\n\" + message[\"content\"] + \" [/INST]\" }}\n        {%- else %}\n            {{- \" [INST] \" + "
    "message[\"content\"] + \" [/INST]\" }}\n        {%- endif %}\n    {%- elif message[\"role\"] == \"assistant\" %}\n"
    "        {{- \" \" + message[\"content\"] + eos_token}}\n    {%- else %}\n        {{- raise_exception(\"Only user "
    "and assistant roles are supported, with the exception of an initial optional system message!\") }}\n"
    "    {%- endif %}\n{%- endfor %}\n",
    "llama-2": "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + "
    "eos_token }}{% endif %}{% endfor %}",
    "vicuna v1.1": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message "
    "= messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = '"
    + VICUNA.format("user") + "' %}{% endif %}{{ bos_token + system_message }}{% for message in loop_messages %}"
    + ALTERNATE + "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
    "vicuna v1.1, in the loop": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = \"" + VICUNA.format("human").replace("\\'", "'") + "\" %}{% endif %}"
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 %}{{ system_message }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}{% elif message['role'] == "
    "'assistant' %}{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
    "vicuna, lines": "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] | trim + "
    "'\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}{{ bos_token + "
    "system_message }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}{{ 'USER: ' + "
    "message['content'] | trim + '\\n' }}{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content']"
    " | trim + eos_token + '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "vicuna, no system": "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' "
    "}}{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}{% elif message['role'] == "
    "'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "vicuna, last in the loop": "{% for message in messages -%}\n    {%- if message['role'] == 'system' -%}\n        "
    "{{ message['content'].strip() + ' ' }}\n    {%- elif message['role'] == 'user' -%}\n        {{ 'USER: ' + "
    "message['content'].strip() + ' ' }}\n    {%- elif message['role'] == 'assistant' -%}\n        {{ 'ASSISTANT: '  + "
    "message['content'] + eos_token + '' }}\n    {%- endif %}\n    {%- if loop.last and add_generation_prompt -%}\n"
    "        {{ 'ASSISTANT:' }}\n    {%- endif -%}\n{%- endfor %}\n",
}  # fmt: skip
STRINGS["llama-3, one line break"] = STRINGS["llama-3, literal"].replace("\n\n", "\n")
OTHERS = {  # none of the families: not to be taken for one
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "roles in title case": PARTS["llava-hf"].replace("upper", "title").replace("ASSISTANT:", "Assistant:"),
    "roles as they are": PARTS["llava-hf"].replace(".upper()", "").replace("ASSISTANT:", "assistant:"),
    "text before the picture": "{% for message in messages %}{{ message['role'].upper() + ': '}}" + TEXTS + IMAGES
    + "{% endfor %}ASSISTANT:",
    "a date": STRINGS["llama-3, literal"].replace("{% for", "{{ 'Today Date: ' + date_string }}{% for", 1),
    "upper-case questions": PARTS["llava-hf"].replace("content['text']", "content['text'] | upper"),
    "another word for a role": STRINGS["mistral v0.2"].replace("[INST]", "[ASK]"),
    "empty": "",
    "not Jinja at all": "{% {{ '",
    "a number": 5,
    "a placeholder of ours": STRINGS["vicuna v1.1"].replace("A chat", "{question}"),
    "<image> in the system prompt": STRINGS["vicuna v1.1"].replace("A chat", "<image>"),
    **{f"text that nobody is shown: {text}": text + STRINGS["vicuna, no system"] for text in (
        "{% if tools %}{{ 'You may call tools. ' }}{% endif %}", "{% if false %}Never said. {% endif %}",
        "{% if messages[0]['role'] == 'system' %}System says: {% endif %}", "{% set greeting = 'Hello there. ' %}",
    )},
    "a part of the question": PARTS["llava-hf"].replace("content['text']", "content['text'][:10]"),
    "a wrong escape": STRINGS["vicuna v1.1"].replace("A chat", "A \\x chat"),
}  # fmt: skip
