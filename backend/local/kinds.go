package local

import (
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// kind is the part of a slot that nearly all slots of a limit have in common: the limit's name, and the rule
// and unit of the state.
type kind struct {
	limit unique.Handle[string]
	rule  quota.Rule
	unit  int64
}

// kinds numbers the kinds in use, so that a slot holds a number and no pointer. A number is found in constant time.
type kinds struct {
	list    []numbered
	numbers *kindNumbers // apart, because only new slots need them; nil until there is a kind
}

type numbered struct {
	kind
	slots int // the slots of this kind; 0 is a free number
}

type kindNumbers struct {
	of   map[kind]uint32
	free []uint32
}

// add counts one more slot of a kind and returns its number.
func (ks *kinds) add(k kind) uint32 {
	if ks.numbers == nil {
		ks.numbers = &kindNumbers{of: make(map[kind]uint32)}
	}
	numbers := ks.numbers
	id, ok := numbers.of[k]
	if !ok {
		if last := len(numbers.free) - 1; last >= 0 {
			id = numbers.free[last]
			numbers.free = numbers.free[:last]
		} else {
			id = uint32(len(ks.list))
			ks.list = append(ks.list, numbered{})
		}
		numbers.of[k] = id
		ks.list[id].kind = k
	}
	ks.list[id].slots++
	return id
}

// drop counts one slot less.
func (ks *kinds) drop(id uint32) {
	n := &ks.list[id]
	if n.slots--; n.slots == 0 {
		delete(ks.numbers.of, n.kind)
		ks.numbers.free = append(ks.numbers.free, id)
		n.kind = kind{}
	}
}
