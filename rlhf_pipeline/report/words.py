"""The page's own words, in English and Chinese, and what people call the measures of a run."""

from collections.abc import Sequence

LANGUAGES = ("en", "zh")

# The measures as they are drawn: groups in order, and of each measure its name in the files and for people.
MEASURES = {
    "Reward": {
        "reward": "reward",
        "objective/rlhf_reward": "reward less the KL penalty",
        "objective/non_score_reward": "KL penalty",
        "objective/scores_std": "spread of the rewards",
        "reward_stderr": "standard error of the reward",
        "accuracy": "accuracy",
        "margin": "margin between better and worse",
        "mean_reward": "mean score",
        "max_reward": "highest score",
        "min_reward": "lowest score",
    },
    "KL": {
        "kl": "KL to the reference",
        "objective/kl_coef": "weight of the KL penalty",
        "watch/kl_slope": "KL gained an update",
        "policy/approxkl_avg": "KL within an update",
    },
    "Entropy": {
        "entropy": "entropy of a token",
        "objective/entropy": "surprise at an answer",
        "policy/entropy_avg": "entropy of a token, as sampled",
        "policy/update_entropy": "entropy of a token, while updating",
    },
    "Loss": {
        "loss": "loss",
        "perplexity": "perplexity",
        "mean_token_accuracy": "tokens guessed",
        "loss/policy_avg": "policy loss",
        "loss/value_avg": "value loss",
        "val/explained_variance": "explained by the critic",
    },
    "Length and variety": {
        "length": "length of an answer",
        "watch/length": "length, rolling",
        "val/num_eos_tokens": "answers that end by themselves",
        "distinct_2": "distinct bigrams",
        "watch/repeated": "answers given more than once",
    },
    "Learning rate and updates": {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "val/ratio": "ratio of new to old",
        "val/ratio_var": "variance of the ratio",
        "policy/clipfrac_avg": "clipped, policy",
        "val/clipfrac_avg": "clipped, value",
        "policy/optimizer_steps": "optimizer steps",
    },
}  # fmt: skip
OTHER = "Other measures"
# Where training and evaluation have two names for one thing.
SAME = {
    "objective/scores": "reward",
    "objective/kl": "kl",
    "val/response_length": "length",
    "watch/distinct_2": "distinct_2",
    "lr": "learning_rate",
}
# The columns of tables and the numbers of a stage.
NAMES = {
    "reward_mean": "reward", "reward_median": "median", "reward_stderr": "± s.e.", "positive": "positive", "kl": "KL",
    "perplexity": "perplexity", "distinct_1": "distinct-1", "distinct_2": "distinct-2", "distinct_3": "distinct-3",
    "repeated": "repeated", "self_bleu": "self-BLEU", "held_out_perplexity": "held-out perplexity",
    "length": "length", "win_rate": "better than before",
    "eval_loss": "held-out loss", "scores": "reward",
    "eval_perplexity": "held-out perplexity", "eval_loss_before": "held-out loss before", "gain": "gain",
    "gain_low": "gain, 95 % from", "gain_high": "gain, 95 % to", "parameters_M": "million parameters",
    "accuracy": "accuracy", "prompt_accuracy": "accuracy by prompt", "rows": "rows", "prompts": "prompts",
    "pairs": "pairs", "margin": "margin", "calibration_error": "calibration error",
    "length_correlation": "correlation with length", "score_mean": "mean score", "score_std": "spread of scores",
    "demonstration_mean": "score of demonstrations", "best_eval_reward": "best held-out reward",
    "predicted": "predicted", "observed": "observed", "count": "count", "collapse_watch": "collapse watch",
    "labelled": "labelled", "judgements": "judgements", "tasks": "tasks", "annotators": "annotators", "ties": "ties",
    "dropped": "dropped", "contradictions": "contradictions", "agreement": "agreement", "rejected": "rejected",
}  # fmt: skip
CHINESE = {
    # the sections and tables
    "What ran": "运行内容",
    "Warnings": "警告",
    "Results": "结果",
    "Curves": "曲线",
    "Samples": "样例",
    "To repeat it": "重现方法",
    "Nothing recorded.": "没有记录。",
    "This stage": "本阶段",
    "Name": "名称",
    "Value": "数值",
    "Role": "用途",
    "Made from": "来源",
    "Policy": "策略模型",
    "Pair": "对比",
    "Before and after": "训练前后",
    "Paired gain": "配对提升",
    "Reward model quality": "奖励模型质量",
    "Calibration": "校准",
    "Bin": "区间",
    "Prompt": "提示",
    "Search": "搜索",
    "Answers to your own prompts": "对自备提示的回答",
    "During training, side by side": "训练过程，并排对照",
    "Evaluation, side by side": "评估，并排对照",
    "Answers to compare": "待比较的回答",
    "By another reward: {}": "由 {} 评判",
    "Paired gain by {}": "配对提升（由 {} 评判）",
    "Away from the reference, in standard deviations of its rewards": "与参考模型的距离（以其奖励的标准差计）",
    "Judge": "评判者",
    "Best answers": "最好的回答",
    "Worst answers": "最差的回答",
    "Most changed answers": "变化最大的回答",
    "Answer {}": "回答 {}",
    "Steps {} to {}": "第 {} 至 {} 步",
    "step": "步",
    "{} of {}": "{} / {}",
    "rank": "名次",
    "(empty)": "（空）",
    "More": "更多",
    "from": "来自",
    "this stage": "本阶段",
    "Not drawn (constant, not finite, or too many)": "未画出（恒定、非有限或过多）",
    "not finite": "非有限值",
    "train": "训练",
    "eval": "评估",
    "steps {} to {}, from {} to {}": "第 {} 至 {} 步，从 {} 到 {}",
    "{} held-out prompts; reward: {}; KL to {}.": "{} 条留出提示；奖励：{}；KL 相对于 {}。",
    "Other": "其他",
    "yes": "是",
    "no": "否",
    "On the dashed line it is as right as it is sure.": "虚线表示把握与正确率一致；点越大样本越多。",
    "how often it is right": "实际正确的比例",
    "how sure it is": "预测的把握",
    # facts
    "experiment": "实验",
    "error": "错误",
    "started": "开始",
    "finished": "结束",
    "time": "用时",
    "seed": "随机种子",
    "data": "数据",
    "git": "代码版本",
    "hardware": "硬件",
    "versions": "软件版本",
    "done": "已完成",
    "running": "运行中",
    "failed": "失败",
    "interrupted": "已中断",
    "waiting": "等待标注",
    "stage": "阶段",
    "status": "状态",
    "last step": "最新步数",
    # several runs
    "Runs": "各运行",
    "Run": "运行",
    "What differs": "设置的差别",
    "Setting": "设置",
    "Stage": "阶段",
    "Comparison": "对比",
    "By round": "按轮次",
    "Rounds": "轮次",
    "Round": "轮",
    "{} runs": "{} 个运行",
    "What each run's last policy said to the same prompts": "各运行最后的策略模型对相同提示的回答",
    # the measures
    "Reward": "奖励",
    "KL": "KL",
    "Entropy": "熵",
    "Loss": "损失",
    "Length and variety": "长度与多样性",
    "Learning rate and updates": "学习率与更新",
    "Other measures": "其他指标",
    "reward": "奖励",
    "reward less the KL penalty": "扣除 KL 惩罚后的奖励",
    "KL penalty": "KL 惩罚",
    "spread of the rewards": "奖励的标准差",
    "standard error of the reward": "奖励的标准误",
    "accuracy": "准确率",
    "margin between better and worse": "优劣之间的分差",
    "mean score": "平均得分",
    "highest score": "最高得分",
    "lowest score": "最低得分",
    "KL to the reference": "与参考模型的 KL",
    "weight of the KL penalty": "KL 惩罚系数",
    "KL gained an update": "每次更新增加的 KL",
    "KL within an update": "单次更新内的 KL",
    "entropy of a token": "每个词元的熵",
    "surprise at an answer": "整个回答的负对数概率",
    "entropy of a token, as sampled": "采样时每个词元的熵",
    "entropy of a token, while updating": "更新时每个词元的熵",
    "loss": "损失",
    "perplexity": "困惑度",
    "tokens guessed": "猜中的词元",
    "policy loss": "策略损失",
    "value loss": "价值损失",
    "explained by the critic": "价值函数解释的方差",
    "length of an answer": "回答长度",
    "length, rolling": "长度（滑动平均）",
    "answers that end by themselves": "自行结束的回答",
    "distinct bigrams": "不同二元组的比例",
    "answers given more than once": "重复的回答",
    "learning rate": "学习率",
    "gradient norm": "梯度范数",
    "ratio of new to old": "新旧概率之比",
    "variance of the ratio": "概率比的方差",
    "clipped, policy": "策略裁剪比例",
    "clipped, value": "价值裁剪比例",
    "optimizer steps": "优化器步数",
    # columns
    "median": "中位数",
    "± s.e.": "± 标准误",
    "positive": "正面",
    "distinct-1": "distinct-1",
    "distinct-2": "distinct-2",
    "distinct-3": "distinct-3",
    "repeated": "重复",
    "self-BLEU": "self-BLEU",
    "length": "长度",
    "gain": "提升",
    "95 % from": "95 % 下限",
    "95 % to": "95 % 上限",
    "better than before": "优于之前",
    "held-out loss": "留出集损失",
    "held-out perplexity": "留出集困惑度",
    "held-out loss before": "训练前留出集损失",
    "gain, 95 % from": "提升 95 % 下限",
    "gain, 95 % to": "提升 95 % 上限",
    "million parameters": "参数（百万）",
    "accuracy by prompt": "按提示的准确率",
    "rows": "行数",
    "prompts": "提示数",
    "pairs": "对数",
    "margin": "分差",
    "calibration error": "校准误差",
    "correlation with length": "与长度的相关",
    "spread of scores": "得分的标准差",
    "score of demonstrations": "示范的得分",
    "best held-out reward": "留出集最高奖励",
    "predicted": "预测",
    "observed": "实际",
    "count": "数量",
    "collapse watch": "崩溃监测",
    "labelled": "已标注",
    "judgements": "评判数",
    "tasks": "任务数",
    "annotators": "标注者",
    "ties": "平局",
    "dropped": "舍去",
    "contradictions": "矛盾",
    "agreement": "一致率",
    "rejected": "拒绝",
    # a sweep
    "Reward: {}. KL in nats, on a square-root scale.": "奖励：{}。KL 以 nat 计，横轴为平方根刻度。",
    "Policies of the sweep": "各策略模型",
    "Best of n, without training": "n 选一（不经训练）",
    "best of": "选优",
    "best of n": "n 选一",
    "Answers of each run's last policy": "各运行最后的策略模型的回答",
    "before": "训练前",
    "result": "结果",
    "more": "更多",
    "as good as best of": "相当于 n 选一的 n",
    "frontier": "前沿",
    "policies": "策略模型数",
    "{}: from {} to {}, at a KL of up to {}": "{}：从 {} 到 {}，KL 至多 {}",
    "policy: reward on held-out prompts": "策略模型：留出提示上的奖励",
    "policy: KL to the reference": "策略模型：与参考模型的 KL",
    "reward model: held-out accuracy": "奖励模型：留出集准确率",
    "RM accuracy": "奖励模型准确率",
    "RM score": "奖励模型得分",
    "gain over the reference": "相对参考模型的提升",
}


class Words:
    """Says a phrase in the page's language; what has no translation stays English."""

    def __init__(self, lang: str = "en") -> None:
        self.lang = lang
        self._known = CHINESE if lang == "zh" else {}

    def __call__(self, phrase: str, *values: object) -> str:
        """The phrase, with values in the place of its braces."""
        said = self._known.get(phrase, phrase)
        return said.format(*values) if values else said

    def name(self, key: str) -> str:
        """What people call a number of the files; its own name where it has no other."""
        return self(NAMES.get(key, key))

    def measure(self, key: str) -> str:
        """The same for a measure that is drawn."""
        return self(next((named[key] for named in MEASURES.values() if key in named), key))


def grouped(keys: Sequence[str]) -> dict[str, list[str]]:
    """Measures by the group they are drawn in, in the order of both; a loss that is not known is still a loss."""
    groups = {group: [key for key in named if key in keys] for group, named in MEASURES.items()}
    known = {key for found in groups.values() for key in found}
    rest = [key for key in keys if key not in known]
    groups["Loss"] += [key for key in rest if "loss" in key]
    groups[OTHER] = [key for key in rest if "loss" not in key]
    return {group: found for group, found in groups.items() if found}
