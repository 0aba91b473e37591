package quota

import (
	"fmt"
	"strconv"
	"strings"
)

// maxNumber bounds the numbers of a stored state: integers are exact in a double up to here.
const maxNumber = 1 << 53

// AppendText appends the text in which stores keep an item: its rule, its unit, A, B, C and the tail, in
// decimal, separated by colons, such as "tb1:100000:250000:1795427141791724:0".
func (it *Item) AppendText(dst []byte) []byte {
	dst = append(dst, it.Rule.String()...)
	s := &it.State
	for _, n := range [...]int64{s.Unit, s.A, s.B, s.C} {
		dst = strconv.AppendInt(append(dst, ':'), n, 10)
	}
	for _, n := range s.Tail {
		dst = strconv.AppendInt(append(dst, ':'), n, 10)
	}
	return dst
}

// ParseItem reads what AppendText wrote; the empty text is the zero Item. Anything else is
// ErrMisconfigured.
func ParseItem(text string) (Item, error) {
	var it Item
	if text == "" {
		return it, nil
	}
	rule, rest, _ := strings.Cut(text, ":")
	if len(rule) == 0 || len(rule) > len(it.Rule) || strings.IndexByte(rule, 0) >= 0 {
		return Item{}, notState(text)
	}
	copy(it.Rule[:], rule)
	for i := 0; ; i++ {
		number, more, again := strings.Cut(rest, ":")
		n, err := strconv.ParseInt(number, 10, 64)
		if err != nil || n > maxNumber || n < -maxNumber || i >= 4+MaxTail || number[0] == '+' {
			return Item{}, notState(text)
		}
		switch i {
		case 0:
			it.State.Unit = n
		case 1:
			it.State.A = n
		case 2:
			it.State.B = n
		case 3:
			it.State.C = n
		default:
			it.State.Tail = append(it.State.Tail, n)
		}
		if !again {
			if i < 3 || it.State.Unit < 1 {
				return Item{}, notState(text)
			}
			return it, nil
		}
		rest = more
	}
}

func notState(text string) error {
	const most = 40
	return fmt.Errorf("quota: %w: the store holds %.*q, which is no state of a limit", ErrMisconfigured, most, text)
}
