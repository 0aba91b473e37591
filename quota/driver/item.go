package driver

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
)

// AppendText appends an item as text, and returns the extended slice: its rule, its unit, A, B, C and the tail, in
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

// ParseItem reads the text that AppendText wrote; the empty text is the zero Item. Any other text is ErrMisconfigured.
func ParseItem(text string) (Item, error) {
	var it Item
	if text == "" {
		return it, nil
	}
	rule, rest, _ := strings.Cut(text, ":")
	if copy(it.Rule[:], rule) < len(rule) || !it.Rule.Valid() || len(rule) != len(it.Rule.String()) {
		return Item{}, notState(text)
	}
	for i := 0; ; i++ {
		number, more, again := strings.Cut(rest, ":")
		n, ok := parseNumber(number)
		if !ok || i >= 4+quota.MaxTail {
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

// parseNumber reads a number of a state in the one form that AppendText writes: another program wrote any other form.
func parseNumber(s string) (int64, bool) {
	digits := strings.TrimPrefix(s, "-")
	if digits == "" || digits[0] < '0' || digits[0] > '9' || digits[0] == '0' && s != "0" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n <= quota.MaxNumber && n >= -quota.MaxNumber
}

func notState(text string) error {
	const most = 40
	return fmt.Errorf("quota: %w: the store holds %.*q, which is not the state of a limit", quota.ErrMisconfigured, most, text)
}
