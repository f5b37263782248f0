"""Which captions are mostly boilerplate: dates, names of files, addresses, credits, words of web pages.

The paper drops captions that are mostly boilerplate, such as "photographed on" with a date in one of many formats
(Ramesh et al. 2021, app. C, after Sharma et al. 2018), and gives neither patterns nor a threshold: these are ours. They
are English, with months in six more languages. Of 15,833 captions of Conceptual Captions (its validation set, which
was filtered like this by its makers) they drop 3, of 1,014 that people wrote for Multi30k none.

The time that it takes grows in proportion to a caption's length, whatever is in it: every repetition in the patterns
is bounded or possessive (`++`, never given back), and begins only where a word does.
"""

from __future__ import annotations

import re

# The share of a caption's letters and digits outside of boilerplate below which it is dropped: "mostly" is more than
# half. A date or a credit beside a description does no harm.
LEAST_SHARE_LEFT = 0.5

# English; then German, French, Spanish, Italian, Portuguese and Dutch where they differ.
_MONTH = (
    r"(?:jan(?:uary|uar|uari|vier)?|feb(?:ruary|ruar|ruari|r)?|mar(?:ch|zo|t)?|apr(?:il|ile)?|may|june?|july?"
    r"|aug(?:ust|ustus)?|sept?(?:ember|embre|iembre)?|oct(?:ober|obre|ubre)?|nov(?:ember|embre|iembre)?"
    r"|dec(?:ember|embre)?|märz|maart|mai|mei|juni|juli|okt(?:ober)?|dez(?:ember|embro)?|févr?(?:ier)?|avr(?:il)?|juin"
    r"|juillet|août|aout|décembre|enero|febrero|abril|mayo|junio|julio|agosto|setiembre|dic(?:iembre|embre)?|gennaio"
    r"|febbraio|maggio|giugno|luglio|settembre|ottobre|janeiro|fevereiro|março|maio|junho|julho|setembro|outubro"
    r"|novembro)\b\.?"
)
_WEEKDAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\b\.?"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st\b|nd\b|rd\b|th\b|er\b|[ªº.])?"
_YEAR = r"(?:1[89]|20)\d\d"
_GAP = r"[ ,./-]{0,3}(?:(?:of|de|del|the) )?"
_HOUR = r"(?:[01]?\d|2[0-3])"
_DATES = (
    # 3rd of May, 2014; 3 mai 2014; 3-May-14. French March only here: "Mars 2020" is a rover.
    rf"{_DAY}{_GAP}(?:{_MONTH}|mars\b)(?:{_GAP}(?:{_YEAR}|'?\d\d))?(?!\w)",
    rf"{_MONTH}{_GAP}{_DAY}(?:{_GAP}(?:{_YEAR}|'\d\d))?(?!\w)",  # May 3rd, 2014
    rf"{_MONTH}{_GAP}(?:{_YEAR}|'\d\d)(?!\w)",  # May 2014
    rf"{_YEAR}{_GAP}{_MONTH}(?:{_GAP}{_DAY})?(?!\w)",  # 2014 May 3
    # 2014-05-03; 3. 5. 2014; 05/03/14; 2014-05-03T10:30:59Z
    r"\d{1,4} ?[./-] ?\d{1,2} ?[./-] ?\d{1,4}(?:t\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?z?)?(?!\w)",
    rf"{_YEAR}[ :_]\d\d[ :_]\d\d(?!\d)",  # 2014:05:03, as in EXIF data
    # 20140503, 20140503_123456, 20140503T123456Z
    rf"{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:[_t-]?\d{{4,9}})?z?(?!\w)",
    rf"(?:0?[1-9]|1[0-2])[./-]{_YEAR}(?!\w)",  # 05/2014
    r"\d{2,4}年(?:\d{1,2}月)?(?:\d{1,2}日)?",
    rf"(?:circa|ca?\.|ca|abt\.?|early|mid|late) ?-?{_YEAR}(?:'?s)?(?!\w)",
    rf"{_YEAR}(?: ?[-/\u2013] ?(?:{_YEAR}|\d\d))?(?!\w)",  # 2014; 2014-15
)
_TIMES = (
    # 10:30; 10h30; 10:30:59.123; 10:30 p.m.; 10:30:59 UTC
    rf"{_HOUR}[:h][0-5]\d(?:[:.][0-5]\d(?:\.\d{{1,6}})?)?"
    r"(?: ?[ap]\.?m\b\.?)?(?: ?(?:gmt|utc|[ecmp][sd]t)\b)?(?!\w)",
    r"(?:0?[1-9]|1[0-2]) ?[ap]\.?m\b\.?",  # 5 pm
)
_PICTURE = r"(?:photo(?:graph)?s?|pictures?|pics?|images?|snapshots?)"
# "Photographed on" and the like go only with a date: "photographed on the beach" says something of the picture.
_DATED = (
    rf"(?:{_PICTURE} (?:(?:was|were) )?)?(?:taken|photographed|shot|made|captured|snapped|scanned|created|recorded"
    r"|uploaded|posted|published|added|updated|modified|dated|date)"
    r"(?: (?:on|in|at|from|during))?:? (?:(?:about|around|the) )?"
)
_WHEN = (
    rf"(?:{_DATED})?(?:{_WEEKDAY},? )?(?:the )?(?:{'|'.join(_DATES)})",
    rf"(?:{_DATED}|at )?(?:{'|'.join(_TIMES)})",
)

# One to three words, up to one that is part of no name.
_NAME = r"(?:@?(?!(?:a|an|and|at|for|from|in|is|of|on|the|to|with)\b)\w++[.']?[ -]?){1,3}"
_CAMERA = (
    r"(?:canon|nikon|sony|olympus|panasonic|fuji(?:film)?|pentax|leica|kodak|iphone|samsung|nokia|gopro|instagram)"
    r"(?: (?:[a-z]{0,9}\d\w{0,9}|eos|pro)){0,3}"
)
_CREDITS = (
    rf"(?:{_PICTURE}|photography)(?: (?:taken|made|shot|credits?))? (?:by|courtesy(?: of)?)[: ] ?{_NAME}",
    # "Photo: John Smith" ends many captions of newspapers; at the beginning "photo:" may be followed by anything.
    rf"(?<=\S )(?:{_PICTURE}|photography) ?: ?{_NAME}(?=\W*+$)",
    rf"(?:{_PICTURE} )?(?:credits?|copyright|courtesy)(?: ?: ?| (?:of|by|to)[: ] ?){_NAME}",
    rf"(?:©|\(c\)|copyright (?:©|\(c\)))(?: ?{_YEAR}(?:-{_YEAR})?)?(?:,? ?(?:by )?{_NAME})?",
    rf"copyright(?: ?{_YEAR}(?:-{_YEAR})?(?: (?:by )?{_NAME})?|(?=\W*+$))",
    rf"(?:{_PICTURE} )?(?:taken|shot|made) (?:with|on|using) (?:an? |my |the )?{_CAMERA}",
    r"(?:all|some|no) rights reserved\b",
    r"(?:licen[sc]ed )?(?:under )?(?:a )?creative commons\b(?: licen[sc]e\b)?",
    r"(?:licen[sc]ed )?(?:under )?cc[ -]by(?:-nc|-nd|-sa){0,2}(?: \d\.\d)?(?!\w)",
)
_STOCK = (
    r"(?:royalty[ -]?free|rights[ -]managed) ?(?:stock )?(?:photo(?:graph(?:s|y)?|s)?|pictures?|images?|vectors?)?\b",
    r"stock (?:photo(?:graph(?:s|y)?|s)?|pictures?|images?|vectors?|illustrations?|footage|videos?)\b(?: of\b)?",
    r"(?:getty ?images?|shutterstock|i ?stock(?: ?photo)?|alamy|dreamstime|123rf|depositphotos|fotolia|adobe ?stock)\b",
)
_PAGES = (
    r"(?:click|tap|hover|press)(?: (?:here|on|over|the|this|image|photo|picture|thumbnail|link)){0,4}"
    r" (?:to|for) (?:a )?(?:enlarge|view|zoom|see|open|expand|download|read|larger|bigger|full|more|details)\b"
    r"(?: (?:an?|the|in|this|it|larger|bigger|full|sized?|version|image|photo|picture|more|details|resolution)\b){0,6}",
    r"(?:view|see|show|download|open) (?:the )?(?:larger|bigger|original|full[ -]size)\b"
    r"(?: (?:size|image|photo|picture|version)\b){0,2}",
    r"(?:enlarge|zoom|larger|full[ -]size) (?:image|photo|picture|version|view)\b",
    r"(?:untitled|unnamed|title unknown)\b",
    r"no (?:title|caption|description|image|photo|picture)(?: available)?(?=\W*+$)",
    r"(?:image|photo|picture|preview) (?:is )?(?:not (?:available|found)|unavailable|coming soon|placeholder)\b",
    r"(?:read|learn|find out) more\b",
    rf"\A{_PICTURE}(?=\W*+$)",  # nothing else
)
_FILES = (
    # Names that cameras, telephones and scanners give.
    r"_?(?:img|imag|imgp|image|mg|dscn?|dscf|pict?|cimg|sam|pxl|gopr|dji|mvc|hpim|kif|scan|vid|wp|dcp|sany)"
    r"(?:[_ -]?\d{3,9}){1,3}[a-z]?(?!\w)",
    r"(?:p[0-9a-c]\d{6}|s\d{7}|1\d\d_\d{4})(?!\w)",  # P1010123, S7300123, 100_1234
    r"(?:whatsapp image|screen ?shot)[ _-]\d{4}[_-]\d\d[_-]\d\d(?!\w)",
    rf"(?:{_PICTURE}|fig(?:ure|\.)?|slide|page|scan)[ _]?(?:n[or]\.? ?|#)?\d{{1,9}}(?: ?(?:of|/) ?\d{{1,5}})?(?!\w)",
    r"#?\d{5,}+(?!\w)",  # data bases number their pictures
    r"(?:https?://|ftp://|www\.)\S++",
    r"\w[\w.+-]{0,63}+@\w[\w-]{0,62}+\.\S++",
    r"(?:[a-z0-9][a-z0-9-]{0,62}+\.){1,4}(?:com|net|org|info|co\.uk|de|fr|eu)\b(?:/\S*+)?",
)
_SIZES = (
    r"(?:(?:resolution|dimensions|size)[: ]{1,2})?\d{2,5} ?[x\xd7*] ?\d{2,5}(?: ?(?:px|pixels?)\b)?(?!\w)",  # 1920x1080
    r"(?:(?:resolution|size)[: ]{1,2})?\d{1,5}(?:\.\d{1,3})? ?(?:kb|mb|dpi|ppi|px|pixels|megapixels?|mp)\b",
    r"(?:[fƒ]/\d{1,2}(?:\.\d)?|1/\d{1,4} ?s(?:ec)?|iso ?\d{2,6})(?!\w)",  # f/2.8; 1/250 s; ISO 400
)
# Files first, since a date may be part of their name; then credits, since a year may be part of them.
_PATTERN = re.compile(rf"(?<![\w.])(?:{'|'.join((*_FILES, *_SIZES, *_CREDITS, *_STOCK, *_PAGES, *_WHEN))})")
_FILE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".heic", ".avif", ".svg", ".psd", ".pdf"),
    *(".raw", ".cr2", ".nef", ".arw", ".dng", ".mov", ".mp4"),
)


def without_boilerplate(caption: str) -> str:
    """The caption without what the patterns find, in lower case and with single spaces."""
    words = [word for word in caption.lower().split() if not word.rstrip(".,;:!?)]}'\"").endswith(_FILE_EXTENSIONS)]
    return " ".join(_PATTERN.sub(" ", " ".join(words)).split())


def is_boilerplate(caption: str) -> bool:
    """Whether fewer than half of a caption's letters and digits are left without boilerplate, or no letter at all."""
    left = without_boilerplate(caption)
    has_letters = any(map(str.isalpha, left))
    return not has_letters or _count(left) < LEAST_SHARE_LEFT * _count(caption.lower())


def _count(text: str) -> int:
    """Number of letters and digits."""
    return sum(map(str.isalnum, text))
