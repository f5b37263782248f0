"""Which captions are mostly boilerplate."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle1.data.boilerplate import is_boilerplate, without_boilerplate

DATES = """
photographed on 3 May 2014
Photographed on May 3rd, 2014
photo taken on 2014-05-03
Image taken on 05/03/14
Picture taken 3.5.2014
3. 5. 2014
3rd of May, 2014
May 3rd, 2014
May 2014
2014 May 3
3 mai 2014
3-May-14
14. Juli 1998
14 juillet 1998
2 de mayo de 2010
12 Mars 2011
1 dicembre 2001
Sat, 3 May 2014 10:30:00 GMT
Saturday, May 3, 2014 at 10:30 AM
Taken on Sunday 4 May 2014 in Rome
Uploaded on 03/05/2014 by admin
Date: 12 Dec 1999
circa 1920
Photographed circa 1920
c. 1890
1987
2014-15
05/2014
20140503
20140503_123456
2014-05-03T12:34:56Z
2014:05:03 10:11:12
2014年5月3日
10:30 PM
23h15
"""

FILES = """
IMG_1234.JPG
img_1234
IMG-20180102-WA0012.jpg
DSC00012
DSC_0012 (2)
P1010123
100_1234
_MG_4567
PXL_20210304_112233445.jpg
holiday-in-spain-2012.jpeg
scan0001
Screenshot 2014-05-03 at 10.30.11
WhatsApp Image 2018-01-02 at 13.45.22
Picture 123
photo #12
image 3 of 10
Fig. 3
12345678
#2345678
http://www.example.com/photos/1234?size=l
www.example.com/a/b
example.com
someone@example.com
1920x1080
1920 x 1080 pixels
Resolution: 300 dpi
f/2.8 1/250 s ISO 400
"""

WORDS = """
photo by John Smith
Photograph by J. R. Smith
photo by @johnsmith
Photo credit: AP/John Smith
Image courtesy of NASA
(c) 2012 John Smith
© 2012 John Smith. All rights reserved.
Copyright 2012 Example Corp
all rights reserved
CC BY-SA 2.0
Creative Commons License
taken with my iPhone 5s
stock photo
Royalty free stock photos
Getty Images
click to enlarge
Click on the image to view a larger version
Click here for full size image
View larger image
Read more
untitled
Untitled-1
no caption
Image not available
photo
Images
"""

NOTHING = ["", " ", "...", "42", "007 !"]

DESCRIPTIONS = """
a photograph of a clock showing 10:30
the 1969 moon landing
may flowers in a vase
a march of penguins
three march hares
a date palm
The Sun also rises
an august company of judges
December morning in Prague
4th of July fireworks
New York City, 2012
Christmas 2014
a man reading a newspaper dated May 3, 1945
Eiffel Tower at 5 pm
a clock at 10:10
Vintage car, circa 1920
the church of St. Mary, built in 1890
a poster of the movie 1984
a 1920s dress
24 hours of Le Mans
Mars 2020 rover
20 people at a table
BMW 320i 2004
Boeing 747-400
Canon EOS 5D on a wooden table
number 10 Downing Street
route 66
3 cats
sunset
dog
photo of a dog
Photo: a dog jumps over a fence
image of the Earth from space
a stock photo of a red apple on a table
a wedding photographed on film
a portrait photographed on the beach
two dogs running on the beach, photo by John Smith
a man in a photo booth
a woman holding a picture of her mother
framed picture
a page of an old book
a slide in a playground
a fig tree
a no parking sign
a full size violin
copyright symbol on a keyboard
a red button that says click here to win
A public domain map of London in the 17th century
portrait of a woman taken with a wide angle lens
screen shot of a spreadsheet with a chart
a small blue star on the left on a gray background
Le chat noir
собака на траве
犬
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


@pytest.mark.parametrize("caption", [*lines(DATES), *lines(FILES), *lines(WORDS), *NOTHING])
def test_boilerplate_is_found(caption: str) -> None:
    assert is_boilerplate(caption)
    assert is_boilerplate(caption.upper())


@pytest.mark.parametrize("caption", lines(DESCRIPTIONS))
def test_description_is_none(caption: str) -> None:
    assert not is_boilerplate(caption)
    assert not is_boilerplate(caption.title())


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("Sunset over the bay, photographed on 3 May 2014", "sunset over the bay,"),
        ("A dog -  stock photo #1234567", "a dog -"),
        ("Paris IMG_1234.JPG (c) 2012 Jane Doe", "paris"),
        ("Photographed on the beach", "photographed on the beach"),
    ],
)
def test_what_is_left_of_a_caption(caption: str, left: str) -> None:
    assert without_boilerplate(caption) == left


@pytest.mark.parametrize(
    ("caption", "dropped"),
    [
        ("abcd 2014", False),  # 4 of 8 letters and digits are left
        ("abc 2014", True),  # 3 of 7
        ("ab, c! 2014", True),  # punctuation does not count
    ],
)
def test_half_of_the_letters_and_digits_must_be_left(caption: str, dropped: bool) -> None:
    assert is_boilerplate(caption) == dropped


@given(st.text())
def test_any_text_is_judged(caption: str) -> None:
    left = without_boilerplate(caption)
    assert sum(map(str.isalnum, left)) <= sum(map(str.isalnum, caption.lower()))
    assert is_boilerplate(caption) in (True, False)


@pytest.mark.parametrize(
    "part",
    [
        *("1", "1 ", "1/", "1.", "1 / ", "9 9 - ", "2014 ", "2014-", "may ", "may 1", "3 may ", "12:", "'14 ", "t1"),
        *("a", "a.", "a-", "-", "a@", "@", ".", "/", "www.", "http://", "img_", "img_1234567_", ".jpg"),
        *("photo ", "photo!", "photo by ", "photo taken on ", "by a", "(c)", "© ", "click here on the ", "cc by-nc"),
        *("no image", "stock ", "royalty free ", "\u0130", "年", "\n"),
    ],
)
def test_time_grows_with_the_length_of_the_caption_only(part: str) -> None:
    hostile = (part * 100_000)[:100_000]
    start = time.perf_counter()
    is_boilerplate(hostile)
    # It takes 0.2 s at most; time that grows with the square would be minutes.
    assert time.perf_counter() - start < 3
