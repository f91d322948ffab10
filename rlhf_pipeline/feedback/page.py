"""The labelling config: what Label Studio's page shows of a task, and what one does there.

Label Studio puts a task's texts into the page as text, never as HTML. A rule of CSS with `>` in it has no effect there.
"""

# The first two rules give the answers the room of panels that have no part in comparing.
_STYLE = """
    .lsf-sidepanels { padding: 0 !important; }
    .lsf-sidepanels__wrapper { display: none; }
    .rlhf { max-width: 72rem; margin: 0 auto; font-size: 15px; line-height: 1.6; }
    .rlhf h3, .rlhf h5 { margin: 4px 0 !important; }
    .rlhf-hint * { font-size: 14px !important; font-weight: 400 !important; opacity: .85; }
    .rlhf-prompt, .rlhf-answer, .htx-ranker-item p {
      white-space: pre-wrap; overflow-wrap: anywhere; font-size: inherit; line-height: inherit;
    }
    .rlhf .lsf-htx-richtext { padding: 0; line-height: inherit; }
    .rlhf-prompt { margin: 12px 0 20px; padding: 12px 16px; border-left: 4px solid #4c5fa9; }
    .rlhf-prompt { background: rgba(76, 95, 169, .08); }
    .rlhf-answers { display: flex; flex-wrap: wrap; gap: 16px; align-items: stretch; }
    .rlhf-answer { display: flex; flex: 1 1 300px; min-width: 0; }
    .rlhf-answer { border: 1px solid rgba(128, 128, 128, .45); border-radius: 4px; }
    .rlhf-answer div { flex: 1; min-width: 0; }
    .rlhf-answer .lsf-htx-richtext { min-height: 64px; padding: 12px 16px; }
    .htx-ranker-item p:last-child { display: none; }
  """

# What the page tells the annotator, by language (`report.lang`).
_WORDS = {
    "en": {
        "which": "Which answer is better? Click it.",
        "neither": "Ctrl+Enter submits. Neither is better: skip, Ctrl+Space.",
        "order": "Drag the answers into order: best on top",
        "as_it_is": "Right as it is? Move one answer and put it back, and Submit opens.",
        "keys": "Keys: Tab to an answer, Space lifts it, arrows move it, Space drops it. "
        "Ctrl+Enter submits, Ctrl+Space skips.",
    },
    "zh": {
        "which": "哪个回答更好？点击它。",
        "neither": "Ctrl+Enter 提交。分不出好坏就跳过：Ctrl+空格。",
        "order": "拖动回答来排序：最好的放在最上面",
        "as_it_is": "顺序本来就对？把任意一个回答挪开再放回去，就可以提交（Submit）了。",
        "keys": "键盘：Tab 选回答，空格拿起，方向键移动，再按空格放下。Ctrl+Enter 提交，Ctrl+空格 跳过。",
    },
}

_PAIRWISE = """<View className="rlhf">
  <Header value="{which}"/>
  <View className="rlhf-hint"><Header size="6" value="{neither}"/></View>
  <View className="rlhf-prompt"><Text name="prompt" value="$prompt" valueType="text"/></View>
  <Pairwise name="preference" toName="answer1,answer2"
            selectionStyle="box-shadow: 0 0 0 3px #4c5fa9; background: rgba(76, 95, 169, .12)"/>
  <View className="rlhf-answers">
    <View className="rlhf-answer"><Text name="answer1" value="$answer1" valueType="text"/></View>
    <View className="rlhf-answer"><Text name="answer2" value="$answer2" valueType="text"/></View>
  </View>
  <Style>{style}</Style>
</View>
"""

_RANKER = """<View className="rlhf">
  <View className="rlhf-prompt"><Text name="prompt" value="$prompt" valueType="text"/></View>
  <List name="items" value="$items" title="{order}"/>
  <Ranker name="ranking" toName="items"/>
  <View className="rlhf-hint"><Header size="6" value="{as_it_is}"/><Header size="6" value="{keys}"/></View>
  <Style>{style}</Style>
</View>
"""


def labeling_config(answers: int, lang: str = "en") -> str:
    """The config for tasks of up to `answers` answers: a click on the better of two, or a list to be put in order."""
    return (_PAIRWISE if answers <= 2 else _RANKER).format(style=_STYLE, **_WORDS[lang])
