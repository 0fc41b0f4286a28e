# ik-llama-cpp-python 0.1.5's source lacks the script that writes down which version it is; without it nothing is built.
file(WRITE "${CMAKE_SOURCE_DIR}/vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake"
    "set(BUILD_NUMBER 0)\nconfigure_file(common/build-info.cpp.in common/build-info.cpp)\n")
