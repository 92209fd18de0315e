r"""The spellings of mathematics that mean the same: tables, and patterns with what replaces them. Used by `latex.py`."""

import re

# Characters of a cleaned answer that stand for what LaTeX has no single character for. They are from the private use
# area, so nobody writes them, and `UNICODE` below blanks any that come in.
WORDS_OPEN, WORDS_CLOSE = "\ue000", "\ue001"
"""Around words, so that no later step can read "even" as the product of four variables."""
MARKS = f"[{WORDS_OPEN}{WORDS_CLOSE}]"
DOLLAR = "\ue002"
"""A currency sign, as opposed to the `$` that delimits mathematics."""
ROW_BREAK = "\ue003"
"""The `\\\\` of a matrix."""

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = r"""
α \alpha  β \beta  γ \gamma  δ \delta  ε \epsilon  θ \theta  λ \lambda  μ \mu  π \pi  ρ \rho  σ \sigma  τ \tau  φ \phi  ϕ \phi
χ \chi  ψ \psi  ω \omega  Γ \Gamma  Δ \Delta  Θ \Theta  Λ \Lambda  Σ \Sigma  Φ \Phi  Ψ \Psi  Ω \Omega  ℝ \mathbb{R}  ℤ \mathbb{Z}
· \cdot  ⋅ \cdot  ∙ \cdot  • \cdot  × \times  ÷ /  ⁄ /  ∕ /  ± \pm  ∓ \mp  √ \sqrt  ∞ \infty  ∠ \angle  ° °  º °  ′ '  ’ '  ″ ''  ” ''
≤ \le  ⩽ \le  ≥ \ge  ⩾ \ge  ≠ \ne  ≈ \approx  ∀ \forall  ∈ \in  ∪ \cup  ∩ \cap  ∅ \emptyset  ∖ \setminus  ⟨ \langle  ⟩ \rangle
， ,  。 .  ： :  ； ;  （ (  ） )  － -  − -  – -  — -  ‐ -  ‑ -  ﹣ -
½ \frac{1}{2}  ¼ \frac{1}{4}  ¾ \frac{3}{4}  ⅓ \frac{1}{3}  ⅔ \frac{2}{3}  ⅕ \frac{1}{5}  ⅖ \frac{2}{5}  ⅗ \frac{3}{5}
⅘ \frac{4}{5}  ⅙ \frac{1}{6}  ⅛ \frac{1}{8}
"""
_words = _SYMBOLS.split()
_pairs = dict(zip(_words[::2], _words[1::2], strict=True))
UNICODE = str.maketrans(
    {char: f"{plain} " if plain.startswith("\\") and plain[-1] != "}" else plain for char, plain in _pairs.items()}
    | dict.fromkeys("\u00a0\u2009\u200a\u202f\u2002\u2003\u3000\t\r\n\x00", " ")
    | dict.fromkeys((WORDS_OPEN, WORDS_CLOSE, DOLLAR, ROW_BREAK), " ")  # our marks are nobody else's
    | dict.fromkeys("\u200b\u200c\u200d\ufeff\u2061\u2062\u2063", "")
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF10, 0xFF1A)}
)

_COMMANDS = r"""
leq leqslant leqq = \le
geq geqslant geqq = \ge
neq = \ne
dfrac tfrac cfrac sfrac nicefrac = \frac
lvert rvert vert mid = |
ldots cdots dotsc dotsb = \dots
lt = <
gt = >
lbrace = \{
rbrace = \}
lbrack = [
rbrack = ]
cdotp ast bullet = \cdot
div = /
colon = :
varnothing = \emptyset
smallsetminus = \setminus
degree degrees = °
simeq = \approx
R Reals reals = \mathbb{R}
lg = \log_{10}
varphi = \phi
varepsilon = \epsilon
imath = i
"""
SYNONYMS: dict[str, str] = {}
for _line in _COMMANDS.strip().splitlines():
    _names, _, _plain = _line.partition(" = ")
    _space = " " if re.fullmatch(r"\\[a-z]+", _plain) and _plain != "\\frac" else ""
    SYNONYMS |= dict.fromkeys(_names.split(), _plain + _space)
SYNONYM = re.compile(r"\\(" + "|".join(SYNONYMS) + r")(?![a-zA-Z])\s*")

GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell"
FUNCTIONS = "arcsin|arccos|arctan|arccot|arcsec|arccsc|sinh|cosh|tanh|coth|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min|gcd|lcm|det|deg"
NAMED = re.compile(
    rf"{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE}|(?<![\\a-zA-Z])(?:({FUNCTIONS}|sqrt|pi|infty|theta)|(infinity|inf|oo))(?![a-zA-Z])"
)
WORD_GROUP = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|math(?:rm|bf|sf|it|tt|normal)|operatorname|boldsymbol|bm|emph|underline)\*?\s*"
    r"\{([^{}]*)\}"
)
SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]ig+[lrm]?|displaystyle|textstyle|limits|nolimits|rm|bf|tiny|small|normalsize|large|Large|LARGE|huge|Huge|boldmath)(?![a-zA-Z])\s*\.?"
)
SPACES = re.compile(
    r"\\(?:[,;:>\s]|q?quad(?![a-zA-Z])|enspace(?![a-zA-Z])|thinspace(?![a-zA-Z])|hspace\*?\{[^{}]*\})|~"
)
ENTITY = re.compile(r"&#?\w+;")
TAGS = (
    (re.compile(r"<sup>([^<>]*)</sup>", re.IGNORECASE), r"^{\1}"),
    (re.compile(r"<sub>([^<>]*)</sub>", re.IGNORECASE), r"_{\1}"),
    (re.compile(r"<(i|b|em|strong|u|p|span|div|font|var|small)(?:\s[^<>]*)?>([^<>]*)</\1>", re.IGNORECASE), r"\2"),
    (re.compile(r"<br\s*/?>", re.IGNORECASE), " "),
)
"""The HTML of golds that were taken from web pages."""
CIRCLED = re.compile(r"[\s$]*(?:\\(?:text|mathrm)\s*\{)?\s*[①-⑳](?:(?:[\s,;、]|\band\b)*[①-⑳])*\s*\}?[\s$.]*")
"""An answer that consists of the numbers of statements: ①②④ is the list 1, 2, 4."""
DATE = re.compile(r"([A-Z][a-z]{2,8}\s?\d{1,2})(?:st|nd|rd|th)(?![a-zA-Z])")
CIRCLE = re.compile(r"\\(?:text)?circled\s*\{\s*(?:\\[a-z]+\s*)?\{?\s*(\d{1,2})\s*\}?\s*\}")
_ACCENT = r"\\(bar|dot|ddot|hat|vec|tilde|overline)"
ALIGNED = re.compile(r"\\begin\{(aligned|align\*?|gathered|split)\}(.*?)\\end\{\1\}", re.DOTALL)
PLAIN = (
    (re.compile(r"\\(?:boxed|fbox)\s*(?=\{)"), " "),
    (re.compile(r"\\(?:therefore|blacksquare|square|Box|qed|checkmark|hfill|newline|centering)(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}"), " "),
    (
        re.compile(r"\\begin\{(aligned|align\*?|array|gathered|split)\}(?:\{[lcr| ]*\})?([^&\ue003]*?)\\end\{\1\}"),
        r" \2 ",
    ),
    (re.compile(rf"{_ACCENT}(?:\s+(?=[a-zA-Z])|\s*(?=\d))([a-zA-Z\d])(?![a-zA-Z])"), r"\\\1{\2}"),
    (re.compile(r"\\hat\{([ijk])\}"), r"\\vec{\1}"),
    (re.compile(r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}"), r"\\overline{\1\2\3}"),
    (re.compile(r"(?<=[.\d])\\dot\{(\d)\}"), r"\\overline{\1}"),
    (re.compile(r"\{\s*:\s*\}"), ":"),
    (re.compile(r"(?:\{\s*\})?[_^]\s*\{?(\d+)\}?\s*C\s*_\s*\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"\\!|\\[hv]?phantom\s*(?:\{[^{}]*\}|[-+\w])"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\^\s*°|\^\s*\{\s*°\s*\}"), "°"),
    (re.compile(r"\\%|\\text\{\s*%\s*\}"), "%"),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"\^\s*\{\s*\\prime\s*\\prime\s*\}|(?:\^\s*)?\\prime\s*\\prime(?![a-zA-Z])"), "''"),
    (re.compile(r"\^\s*\{\s*(?:\\prime|')\s*\}|(?:\^\s*)?\\prime(?![a-zA-Z])"), "'"),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\\not\s*="), r"\\ne "),
    (re.compile(r"\\hline"), " "),
    (re.compile(r"\{?\s*(\{[^{}]*\}|\w+)\s*\\choose\s*(\{[^{}]*\}|\w+)\s*\}?"), r"\\binom{\1}{\2}"),
    (
        re.compile(r"[(\[]\s*\\begin\{array\}\s*\{[lcr| ]*\}(.*?)\\end\{array\}\s*[)\]]", re.DOTALL),
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (re.compile(r"\\(begin|end)\{[bB]matrix\}"), r"\\\1{pmatrix}"),
)
_ATOM = r"[\da-zA-Z]|\\(?:pi|alpha|beta|gamma|theta|phi|infty)(?![a-zA-Z])"
FRACTIONS = (
    (re.compile(rf"\\frac\s*({_ATOM})"), r"\\frac{\1}"),
    (re.compile(rf"(\\frac\s*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*({_ATOM})"), r"\1{\2}"),
    (re.compile(r"\\frac\s+\{"), r"\\frac{"),
    (re.compile(r"(\\frac\{[^{}]*\})\s+\{"), r"\1{"),
    (re.compile(r"\\binom\s*(\d)\s*(\d)"), r"\\binom{\1}{\2}"),
    (re.compile(r"_\s*(\d(?!\d)|[a-zA-Z](?![a-zA-Z]))"), r"_{\1}"),
    (re.compile(r"\\sqrt\s*([\da-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s+\{"), r"\\sqrt{"),
    (re.compile(r"\\sqrt\s*(\\(?:pi|alpha|beta|theta))(?![a-zA-Z])"), r"\\sqrt{\1}"),
)
LEAD_IN = re.compile(
    rf"^[\s{WORDS_OPEN}]*only\s*{WORDS_CLOSE}?\s*(?=[a-zA-Z](?:_\S+)?\s*=)|^[\s{WORDS_OPEN}]*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\b|:|=)\s*:?[\s{WORDS_CLOSE}]*(?=\S)",
    re.IGNORECASE,
)
SIMPLE = re.compile(r"-?\d+(?:\.\d+)?")
